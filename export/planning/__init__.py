"""`omniport plan`: memory and speed of a device, predicted from shapes and bandwidths."""
