module github.com/spoa-go/spoa/cmd/examples

go 1.26.0

require (
	github.com/golang-jwt/jwt/v5 v5.3.1
	github.com/oklog/run v1.2.0
	github.com/spoa-go/spoa v0.1.0
)

require (
	github.com/go-kit/log v0.2.1 // indirect
	github.com/go-logfmt/logfmt v0.5.1 // indirect
)

replace github.com/spoa-go/spoa => ../../
