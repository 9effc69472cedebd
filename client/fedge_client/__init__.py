"""The site: an agent that holds identity, gate and link, and a worker that trains. It never imports the server."""
