"""Betters a schedule: windows of it solved exactly, and shaving where it is above the budget."""
