"""End-to-end throughput, latency and cost of tunnels between two namespaces; README.md is the method.

cli -> runner -> bench -> systems, topology      which program runs where
          |  -> cases -> traffic, connections    what is sent through it
          |  -> proctree                         what it costs
          v
       results -> table, chart                   what it means
"""
