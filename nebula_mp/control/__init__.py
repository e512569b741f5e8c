"""The brain, without sockets or clocks: datagrams, packets and time in, actions out."""
