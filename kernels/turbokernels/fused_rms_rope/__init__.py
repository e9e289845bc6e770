"""RMSNorm of queries or keys over all heads, then rotary position embedding, in one pass."""
