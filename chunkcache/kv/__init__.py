"""Keys and values as data: layers that hold them, the rotation of keys, bytes and back."""
