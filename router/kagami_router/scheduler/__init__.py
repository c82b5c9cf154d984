"""Who runs next, and on which blocks. Pure: no await, no clock, no socket, no tensor."""
