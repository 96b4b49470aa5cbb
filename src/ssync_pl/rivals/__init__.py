"""Other regularisers, to compare SSync with."""
