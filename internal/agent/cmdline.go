package agent

import "strings"

// importCredentials reports what the kernel command line says of
// systemd.import_credentials=, the switch that keeps PID 1 from taking
// credentials from outside (systemd(1), "Kernel Command Line"). It is on
// unless it says otherwise; the last mention counts.
func importCredentials(cmdline string) bool {
	on := true
	for _, word := range splitCmdline(cmdline) {
		key, value, assigned := strings.Cut(word, "=")
		// proc_cmdline_key_streq of systemd: '-' and '_' are the same.
		if strings.ReplaceAll(key, "-", "_") != "systemd.import_credentials" {
			continue
		}
		if !assigned {
			on = true
			continue
		}
		switch strings.ToLower(value) { // parse_boolean of systemd
		case "1", "yes", "y", "true", "t", "on":
			on = true
		case "0", "no", "n", "false", "f", "off":
			on = false
		}
	}
	return on
}

// splitCmdline splits the kernel command line into words as systemd does:
// white space separates, quotes keep a word together and are dropped, a
// backslash is an ordinary character.
func splitCmdline(s string) []string {
	var words []string
	var word strings.Builder
	started := false
	quote := byte(0)
	flush := func() {
		if started {
			words = append(words, word.String())
		}
		word.Reset()
		started = false
	}
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case quote != 0 && c == quote:
			quote = 0
		case quote == 0 && (c == '"' || c == '\''):
			quote, started = c, true
		case quote == 0 && (c == ' ' || c == '\t' || c == '\n' || c == '\r'):
			flush()
		default:
			word.WriteByte(c)
			started = true
		}
	}
	flush()
	return words
}
