"""The search: which configurations to launch, in what order, and when to stop."""
