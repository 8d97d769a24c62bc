"""Data sources: named, on the device, without download."""
