"""What ranks tell about themselves while they train, and how it is read: a mapped file for each rank, and facts beside them."""
