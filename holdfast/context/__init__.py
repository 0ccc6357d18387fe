"""Context: attention whose memory is bounded, caches with a budget, recurrent states."""
