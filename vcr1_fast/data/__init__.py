"""Records, video decoding, frame sampling and synthetic clips. Nothing here needs torch."""
