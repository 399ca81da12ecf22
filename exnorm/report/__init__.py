"""Tables and figures from what runs have left behind; imports no torch."""
