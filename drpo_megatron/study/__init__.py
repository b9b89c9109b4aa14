"""The FP8 stability study: a grid of short runs, their records, and what can be said of them.

`grid` names the cells, `pool` and `worker` run them, `records` keeps them, `outcome` says which ones collapsed,
`statistics` and `summary` make intervals of them, `report`, `plots` and `page` show them.
"""
