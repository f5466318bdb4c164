package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

const (
	// exporterConns are the connections to an exporter, and exporterScrapes those
	// of them that are answered with metrics at the same time.
	exporterConns   = 32
	exporterScrapes = 4
	// exporterEnd is how long a scrape may take that has begun when the exporter
	// ends.
	exporterEnd = 2 * time.Second
)

// activated returns the sockets that systemd hands over.
func activated() ([]net.Listener, error) {
	listeners, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("taking over systemd's sockets: %w", err)
	}
	for _, l := range listeners {
		if l == nil {
			return nil, errors.New("taking over systemd's sockets: one of them is no stream socket that listens; have only ListenStream= in the socket unit")
		}
	}
	return listeners, nil
}

// handler answers whoever scrapes.
func (e *Exporter) handler() http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collector{e}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorLog: slog.NewLogLogger(e.Log.Handler(), slog.LevelWarn),
		// Something is better than nothing, and what went wrong is counted.
		ErrorHandling: promhttp.ContinueOnError, Registry: registry,
		// It is for this machine by default, and a scrape cheaper so.
		DisableCompression:  true,
		MaxRequestsInFlight: exporterScrapes,
	}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if !e.watching.Load() {
			http.Error(w, "the guests are not watched", http.StatusServiceUnavailable)
			return
		}
		say(w, "ok\n")
	})
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		say(w, "guestctl exporter: the metrics are at /metrics\n")
	})
	return mux
}

func say(w http.ResponseWriter, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = io.WriteString(w, text)
}

// serve serves until ctx ends, or a listener fails.
func (e *Exporter) serve(ctx context.Context) error {
	server := &http.Server{
		Handler:           e.handler(),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       5 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       2 * time.Minute, // longer than most scrape intervals
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(e.Log.Handler(), slog.LevelWarn),
	}
	slots := make(chan struct{}, exporterConns)
	failed := make(chan error, len(e.Listeners))
	var wg sync.WaitGroup
	for _, l := range e.Listeners {
		wg.Go(func() {
			failed <- fmt.Errorf("serving %s: %w", l.Addr(), server.Serve(&limitedListener{Listener: l, slots: slots, closed: make(chan struct{})}))
		})
	}
	var err error
	select {
	case err = <-failed:
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), exporterEnd)
	defer cancel()
	if server.Shutdown(grace) != nil {
		_ = server.Close()
	}
	wg.Wait()
	return err
}

// A limitedListener has so many connections at a time. Others wait until one of
// them ends.
type limitedListener struct {
	net.Listener
	slots  chan struct{}
	closed chan struct{}
	once   sync.Once
}

func (l *limitedListener) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	return &limitedConn{Conn: c, release: sync.OnceFunc(func() { <-l.slots })}, nil
}

func (l *limitedListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

type limitedConn struct {
	net.Conn
	release func()
}

func (c *limitedConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}
