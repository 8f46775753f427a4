"""What each command takes, and the one function that it calls."""
