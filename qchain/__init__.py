"""qchain: an offline toolkit for qcow2 backing chains."""
