"""Messages between ranks: what they say (messages), how they travel (plane), who is believed alive (heartbeat)."""
