// Package docker serves the Docker Engine REST API on an engine.
//
// In flow HTTP requests of Docker clients (docker, compose, the SDKs), of every API
// version from MinVersion to MaxVersion; out flow calls to the engine, in the engine's types,
// and JSON, tar and multiplexed streams back to the clients. The package keeps no
// state: every request is answered from the engine.
//
// One request crosses: Server.ServeHTTP (browser guard, version, panics) → the
// route's handler (query, body) → conversion to engine types (convert_*.go) → the
// engine → conversion back → shaping for the client's version (compat.go) → JSON.
// Error classes become status codes in statusOf and nowhere else. Everything that
// a client sends is bounded and checked.
package docker
