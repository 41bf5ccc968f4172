"""Quality relative to the source, on texts that no run trains on. sets.py has them and contract.py compares."""
