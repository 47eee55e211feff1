"""What makes an engine load quickly: kept kernels, kernels compiled side by side, copies from page-locked memory."""
