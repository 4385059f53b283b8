module github.com/spoa-go/spoa

go 1.25.0

require (
	github.com/go-kit/log v0.2.1
	github.com/oklog/run v1.2.0
)

require github.com/go-logfmt/logfmt v0.5.1 // indirect
