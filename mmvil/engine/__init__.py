"""Hooks and optimizer constructors for mmengine runners."""
