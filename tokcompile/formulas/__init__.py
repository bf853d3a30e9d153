"""What a region computes, read exactly: attention, masks, feed-forward formulas, rotary embeddings, token ids."""
