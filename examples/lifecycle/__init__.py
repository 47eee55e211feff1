"""A model's life on the demo model: it learns facts, is judged, is promoted under load, and is rolled back."""
