"""``normwise compare``: every strategy with every optimizer, each tuned equally."""
