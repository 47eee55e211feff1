"""From a candidate that passed the gate to the model that serves, by shares; and back."""
