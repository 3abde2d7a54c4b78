"""One prompt's way: the hook, the lookup, K/V into the layers, what is new to the store."""
