"""Parts of the hosts: encoders, first slots, slot attention, transformer, decoders."""
