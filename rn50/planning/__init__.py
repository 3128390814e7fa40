"""Money and foresight, from published figures and a run's own log. Imports no torch."""
