"""Other regularisers of the same hosts, to compare SSync with."""
