"""The home-control job in Home Assistant's own form: homes, requests, training chats, and a real Home Assistant."""
