package vm

import (
	"context"
	"os"
	"os/exec"
	"strings"
)

// aptFormat makes apt-get indextargets print one line per index, without a need to read sources.list or its successor.
const aptFormat = "$(ORIGIN)|$(LABEL)|$(RELEASE)|$(COMPONENT)|$(CREATED_BY)|$(REPO_URI)"

// mirror returns the Debian mirror to build from, or "" for debootstrap's own default.
func mirror(ctx context.Context) string {
	if m := os.Getenv("MIRROR"); m != "" {
		return m
	}
	// Off Debian there is no apt-get, and no answer is an answer. The second form also answers before the first
	// "apt-get update", but knows no origin.
	for _, args := range [][]string{
		{"indextargets", "--format", aptFormat},
		{"indextargets", "--no-release-info", "--format", aptFormat},
	} {
		out, err := exec.CommandContext(ctx, "apt-get", args...).Output()
		if err != nil {
			return ""
		}
		if m := parseTargets(string(out)); m != "" {
			return m
		}
	}
	return ""
}

// parseTargets picks the mirror of Debian's main archive from apt's output in aptFormat: not the one for security
// updates, and none of others. It returns "" where there is none.
func parseTargets(out string) string {
	var second string
	for line := range strings.Lines(out) {
		f := strings.SplitN(strings.TrimSpace(line), "|", 6)
		if len(f) != 6 {
			continue
		}
		origin, label, release, component, createdBy, uri := f[0], f[1], f[2], f[3], f[4], f[5]
		if component != "main" || createdBy != "Packages" || !mirrorScheme(uri) {
			continue
		}
		if strings.HasPrefix(origin, "$(") {
			// Not known: a mirror of Debian keeps it in a folder of that name.
			if !strings.HasSuffix(strings.TrimRight(uri, "/"), "/debian") {
				continue
			}
		} else if origin != "Debian" || label != "Debian" {
			continue
		}
		if strings.Contains(release, "security") {
			continue
		}
		if !strings.ContainsAny(release, "-/") {
			return uri
		}
		if second == "" {
			second = uri
		}
	}
	return second
}

// mirrorScheme tells whether debootstrap can use what apt can.
func mirrorScheme(uri string) bool {
	for _, scheme := range []string{"http://", "https://", "file:/"} {
		if strings.HasPrefix(uri, scheme) {
			return true
		}
	}
	return false
}

// proxies returns apt's proxies as environment variables for debootstrap.
func proxies(ctx context.Context) []string {
	out, err := exec.CommandContext(ctx, "apt-config", "shell",
		"http_proxy", "Acquire::http::Proxy", "https_proxy", "Acquire::https::Proxy").Output()
	if err != nil {
		return nil
	}
	return parseProxies(string(out))
}

// parseProxies reads the output of apt-config shell.
func parseProxies(out string) []string {
	var env []string
	for line := range strings.Lines(out) {
		name, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		value = strings.Trim(value, "'")
		if !ok || value == "" || strings.EqualFold(value, "DIRECT") || strings.Contains(value, "'") {
			continue
		}
		if name == "http_proxy" || name == "https_proxy" {
			env = append(env, name+"="+value)
		}
	}
	return env
}
