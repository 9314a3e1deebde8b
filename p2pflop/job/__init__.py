"""Jobs as data: graphs, their shapes and cost, works, results. Pure: no I/O, no clock."""
