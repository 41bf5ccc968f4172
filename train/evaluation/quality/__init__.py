"""What a model keeps of its source, measured on texts that nobody trains on: see measure.py and contract.py."""
