package listen

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"sync/atomic"
	"time"
)

// TLSFiles are the files of a server's certificate and of the authorities of its
// clients. Errors name the flags that Register defines.
type TLSFiles struct {
	Cert, Key string // both or none
	ClientCA  string // empty: any client is let in
}

// Register defines the flags -tls-cert, -tls-key and -tls-client-ca, which set f.
func (f *TLSFiles) Register(flags *flag.FlagSet) {
	flags.StringVar(&f.Cert, "tls-cert", "", "")
	flags.StringVar(&f.Key, "tls-key", "", "")
	flags.StringVar(&f.ClientCA, "tls-client-ca", "", "")
}

// Validate finds files that lack others.
func (f *TLSFiles) Validate() error {
	switch {
	case (f.Cert == "") != (f.Key == ""):
		return errors.New("-tls-cert and -tls-key need each other")
	case f.ClientCA != "" && f.Cert == "":
		return errors.New("-tls-client-ca needs -tls-cert")
	}
	return nil
}

// TLS holds what is in TLSFiles, which may be loaded again while in use. A nil
// *TLS stands for no TLS.
type TLS struct {
	files             TLSFiles
	current           atomic.Pointer[tls.Config]
	reloads, failures atomic.Uint64
}

// Load reads the files. It returns nil if there are none.
func (f *TLSFiles) Load() (*TLS, error) {
	if f.Cert == "" {
		return nil, nil
	}
	t := &TLS{files: *f}
	if err := t.load(); err != nil {
		return nil, err
	}
	return t, nil
}

// Reload reads the files again and puts what they hold in force for new
// connections, or changes nothing.
func (t *TLS) Reload() error {
	err := t.load()
	if err != nil {
		t.failures.Add(1)
	} else {
		t.reloads.Add(1)
	}
	return err
}

func (t *TLS) load() error {
	pair, err := tls.LoadX509KeyPair(t.files.Cert, t.files.Key)
	if err != nil {
		return fmt.Errorf("-tls-cert %s, -tls-key %s: %w", t.files.Cert, t.files.Key, err)
	}
	conf := &tls.Config{Certificates: []tls.Certificate{pair}}
	if t.files.ClientCA != "" {
		if conf.ClientCAs, err = readAuthorities("-tls-client-ca", t.files.ClientCA); err != nil {
			return err
		}
		conf.ClientAuth = tls.RequireAndVerifyClientCert
	}
	t.current.Store(conf)
	return nil
}

// readAuthorities reads certificates in PEM form. Its errors name the flag.
func readAuthorities(flag, file string) (*x509.CertPool, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", flag, err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("%s %s: no certificate in it", flag, file)
	}
	return pool, nil
}

// Wrap returns l speaking TLS if it is a TCP listener, else l itself.
func (t *TLS) Wrap(l net.Listener) net.Listener {
	if t == nil || l.Addr().Network() != "tcp" {
		return l
	}
	return tls.NewListener(l, &tls.Config{
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return t.current.Load(), nil },
	})
}

// Expiry returns when the certificate in force runs out.
func (t *TLS) Expiry() time.Time { return t.current.Load().Certificates[0].Leaf.NotAfter }

// Reloads returns how many times Reload has succeeded, and failed.
func (t *TLS) Reloads() (ok, failed uint64) { return t.reloads.Load(), t.failures.Load() }

// Access says for the log who can reach a listener at addr.
func (t *TLS) Access(addr net.Addr) string {
	tcp, ok := addr.(*net.TCPAddr)
	switch {
	case ok && t != nil && t.files.ClientCA != "":
		return "clients with a certificate of " + t.files.ClientCA
	case !ok || tcp.IP.IsLoopback():
		return "this machine only"
	case t != nil:
		return "whoever reaches this address: TLS without -tls-client-ca asks for no certificate"
	}
	return "whoever reaches this address: there is no authentication"
}

// ClientTLS returns the configuration of a client that trusts the authorities in
// the file ca, or the system's if it is empty; presents the certificate in cert
// and key, unless they are empty; and expects the server to have a certificate
// for name. Its errors name the flags -tls-ca, -tls-cert and -tls-key.
func ClientTLS(ca, cert, key, name string) (*tls.Config, error) {
	conf := &tls.Config{ServerName: name}
	if ca != "" {
		var err error
		if conf.RootCAs, err = readAuthorities("-tls-ca", ca); err != nil {
			return nil, err
		}
	}
	if cert != "" || key != "" {
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			return nil, fmt.Errorf("-tls-cert %s, -tls-key %s: %w", cert, key, err)
		}
		conf.Certificates = []tls.Certificate{pair}
	}
	return conf, nil
}
