"""Start, limit, stop and record one launch of real ranks; nothing here imports torch."""
