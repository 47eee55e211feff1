"""The gate: a candidate beside the model that serves, measured against limits; a report says whether it passed."""
