"""What the documents are made with. No part of the service."""
