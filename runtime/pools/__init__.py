"""KV pools: how a rank's KV memory is laid out, and which bytes of a prefill rank go where on a decode rank."""
