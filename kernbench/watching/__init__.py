"""Which line of the program makes the host wait for the device."""
