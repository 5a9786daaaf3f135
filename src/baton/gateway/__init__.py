"""The door: client-facing HTTP in front of the router. Imports no torch."""
