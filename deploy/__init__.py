"""What runs the served models on a cluster and watches them; `python -m deploy.generate` writes the generated files."""
