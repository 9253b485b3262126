"""What heads do behind their last convolution, written so that it can be exported; importing a file registers it."""
