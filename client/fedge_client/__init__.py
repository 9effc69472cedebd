"""The site: an agent that holds identity and policy, and a worker that trains on data that stays."""
