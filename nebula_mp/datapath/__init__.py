"""The way of packets of established flows: TUN and UDP, through the shared tables, into and out of rings."""
