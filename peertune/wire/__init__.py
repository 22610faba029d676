"""The network: who is who in a federation, what peers send each other, and how."""
