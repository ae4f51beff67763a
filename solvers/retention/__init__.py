"""Retention intervals on graphs without a backward."""
