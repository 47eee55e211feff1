"""The APIs: each turns a body into requests to a backend, and chunks or answers into its own form."""
