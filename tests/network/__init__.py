"""Bad networks for real: namespaces, links that delay, lose, choke and break, and fedkit on them."""
