"""The parts of `scripts/fault_campaign.py`: cases, kinds of fault, and the checks of what a fault left behind."""
